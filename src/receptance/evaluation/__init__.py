"""How good a model is: losses on texts, tasks with right answers, lm-eval, and tests of memory."""
