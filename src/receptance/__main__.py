"""`python -m receptance` is the command line."""

from receptance.cli import main

if __name__ == "__main__":
    main()
