"""Prefect flows: the stages of ``quant.build``, each of them a task. No logic of their own.

This is the only place that imports Prefect. ``quantize`` is the flow of every deployment in
prefect.yaml; its parameters are the deployment's schema, so their names and defaults must stay.
``artifacts`` turns the results of stages into pages. Nothing imports this package.
"""
