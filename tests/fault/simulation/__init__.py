"""The deterministic simulation: real server and client code in virtual time, over a virtual network and disk.

One seed decides everything: the plan, the sites, every delay, every fault. ``run.py`` plays seeds; ``checker.py`` holds
the nine promises of docs/promises.md against the history of each.
"""
