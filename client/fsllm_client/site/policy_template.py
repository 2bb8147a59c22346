"""The policy file that a site begins with: every key, with its default and what it means."""

from typing import Final

TEMPLATE: Final = """\
# The policy of this site. No plan can override a line of it; a plan that asks for more is declined, naming the line.
# The values shown are the defaults. After a change: `systemctl reload fsllm-client`, or send the daemon SIGHUP.
# `fsllm-client explain PLAN` shows what a plan would send from this site and whether this policy accepts it.

[models]
# Which base models runs may use, and where they lie on this host. A model that is not named here is refused;
# only 'embedded', the tiny model for trying fsllm out, needs no line.
# smollm2 = "/srv/models/SmolLM2-135M-Instruct"

[accept]
# false: each run waits until someone here says `fsllm-client accept RUN`; for sites where a person must see each plan.
# automatic = true
# built-in: every method of fsllm itself (docs/algorithms.md), but none of another package.
# algorithms = ["built-in"]
# The kinds of adapter tensors that may leave.
# adapters = ["lora", "dora", "rslora", "lora-xs", "vera", "oft", "ia3", "prefix", "prompt", "p-tuning"]
# The rank of an adapter. Of a plan that leaves the choice (adapter.ranks), the site takes the largest not above it.
# maximum_rank = 16
# maximum_rounds = 1000
# In one round:
# maximum_steps = 10000
# maximum_epochs = 20
# When this site trains, in local time; may pass midnight. Empty: always.
# hours = ["19:00-06:30"]

[leave]
# Measured values that may leave beside the tensors. Counts of examples and tokens always do: they weigh the update.
# train_loss and delta_norm are never sent when the plan adds noise, because they are not noised.
# metrics = ["loss", "perplexity", "exact_match", "reward_accuracy", "train_loss", "delta_norm"]

[privacy]
# The default asks for no noise: the text never leaves, but a delta without noise is not differentially private, and may
# tell something of the rows it was trained on. With few sites, noise strong enough to hide a whole site drowns the
# update: `fsllm plan check` prints the ratio.
# require_noise = false
# minimum_noise_multiplier = 1.0
# maximum_clip_norm = 1.0
# maximum_epsilon_per_run = 8.0
# maximum_epsilon_total = 20.0
# delta = 1e-5

[data]
# train = true
# evaluate = true
# A run that would train on fewer rows than this is refused.
# minimum_rows = 1
"""
