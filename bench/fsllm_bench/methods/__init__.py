"""Every method beside every other, with real daemons, and the robust ones under attack: the table of methods."""
