"""What the deployments need of Ray Serve."""
