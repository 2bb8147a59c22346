"""The way to the server: identity, the stream of orders, transfers."""
