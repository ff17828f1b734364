"""Looking inside a model: what it forgets, holds and reads back, and where an answer comes from."""
