"""The site's daemon and its trainer."""
