"""Prefect flows: the way of ``quant.build``, every stage a task. No logic of its own, and the only Prefect here."""
