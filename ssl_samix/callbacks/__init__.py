"""Lightning callbacks: the monitor, the run's table and its progress."""
