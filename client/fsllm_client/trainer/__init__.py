"""The trainer: a worker process that the daemon starts, gives orders to, and outlives.

In the daemon, without torch: ``supervisor`` starts the worker and talks to it; ``launch`` is its command and
environment, ``deaths`` what it died of, ``orders`` what both say; ``roles`` tells what a tensor is, ``export`` makes
what PEFT loads.

In the worker: ``worker`` is the entry, ``channel`` its end of the socket, ``group`` the ranks, ``session`` the orders;
``base_model``, ``adapters`` and ``tensor_files`` are the model; ``engine``, ``ds_config``, ``loop``, ``local_step``,
``schedule``, ``sharing``, ``kept`` and ``cpu_adam`` train it; ``own_model`` is what comes of it at this site alone;
``evaluate``, ``generate``, ``normalise`` and ``account`` measure.
"""
