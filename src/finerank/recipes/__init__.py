"""Entry points, one file per verb of the program; read these first. Each offers `Settings` and `run(settings)`."""
