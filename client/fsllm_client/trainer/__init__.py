"""The trainer: a worker process that the daemon starts, gives orders to, and outlives.

=====================  ==============================================================================================
In the daemon          ``supervisor`` starts the worker and talks to it; ``launch`` its command and environment; ``deaths``
                       what it died of; ``orders`` what both say; ``roles`` what each tensor is; ``export`` what PEFT loads
In the worker          ``worker`` the entry; ``channel`` its end of the socket; ``group`` the ranks; ``session`` the orders
Models                 ``base_model``, ``adapters``, ``tensor_files``
Training               ``engine`` DeepSpeed; ``ds_config``; ``loop`` a round; ``schedule``; ``optimizer_state``; ``cpu_adam``
Measuring              ``evaluate``, ``generate``, ``normalise``, ``account``
=====================  ==============================================================================================

What the daemon uses imports no torch.
"""
