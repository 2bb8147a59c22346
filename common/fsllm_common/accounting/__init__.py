"""Privacy accounting: what a site has released, and the epsilon of it in closed form."""
