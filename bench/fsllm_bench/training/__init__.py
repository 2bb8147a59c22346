"""How fast a client trains, beside the plain Hugging Face Trainer, and what a round costs it besides training.

========================  ============================================================================================
``rows``                  instruction rows of mixed lengths, made from a seed
``setting``               what both sides share: model, rows, plan, and how many examples make a step
``ours``                  a site's worker, in a process of its own
``plain``                 transformers' Trainer with PEFT and DeepSpeed, in a process of its own
``throughput``            lets them take turns, pass by pass over the same rows
``overhead``              a real federation of two sites: before a round's first step and after its last
``report``                the tables, and the section of docs/performance.md
========================  ============================================================================================
"""
