"""Who is who.

``names`` (federation, role, name), ``authority`` (the federation's CA), ``join`` (join files and tokens), ``keys`` (a
member's key and certificates), ``credentials`` (gRPC's TLS made of them), ``probe`` (why a handshake fails).
"""
