"""What other processes may ask the process of long jobs, by subject; parts of one class."""
