"""What the answers of all APIs share."""
