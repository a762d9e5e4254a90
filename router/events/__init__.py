"""What happens on the server, as one stream of numbered events: types, replay, subscribers."""
