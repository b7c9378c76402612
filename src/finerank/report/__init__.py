"""Reports made from run folders alone; imports no torch."""
