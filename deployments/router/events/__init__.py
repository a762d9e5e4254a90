"""Sources of the router's event stream: the scheduler, the jobs' process and the catalog."""
