"""Decide what a release will be before a weight is read: recipes, types of tensors, sizes.

Everything here is pure, or reads and writes small text files. ``quant.evaluate`` measures. The
error table and the sensitivities come from there as data.

```
recipe, load      nouns of recipes, and loading them with every problem at once
inventory/        a model's tensors from config.json
plan              the type of every tensor: the first rule that matches decides
sizes             bytes of files, shards, KV cache, memory and disk
forecast          a whole release planned: what `quant plan` shows

error_table       quantization error (relative weighted MSE) of each type on each tensor
sensitivity, fit  predict a file's KLD; estimate sensitivities from probes
priors            both for a model of which nothing was measured
units, solver     what may be chosen; the knapsack, solved by HiGHS with a proven gap
budgets, allocate size targets; types for one size or a ladder of sizes
search            candidates that are built and measured
fold, format      types back into rules, and rules into TOML
```

Other packages call ``load_model``, ``load_variant``, ``make_plan``, ``list_tensors`` and the
forecasts of ``sizes``.

Must stay: names of recipe fields (they are TOML keys and part of every manifest), the keys of error
tables and sensitivities, and the bytes of plans (tests/golden). To add a tensor type, see
``quant.llama.types`` and ``CANDIDATES``; to add an architecture, see ``inventory``.
"""
