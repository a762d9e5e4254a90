"""What the requests of all APIs share."""
