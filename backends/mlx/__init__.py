"""MLX models by mlx-lm."""
