"""The site itself: its policy, its privacy ledger, its private state, its host."""
