"""GGUF, the file format of llama.cpp: its container, its number formats, and quantising into them. NumPy only.

What RWKV's tensors are called there is in `checkpoint/gguf.py`; the tokenizer's fields are in `tokenizers/gguf.py`.
"""
