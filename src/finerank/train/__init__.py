"""The training loop with its optimizer, schedule, state and metrics."""
