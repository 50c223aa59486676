"""Calibration: the texts that a model reads, and what is computed from its activations.

```
sets          the TOML of a calibration set
datasets      find, download and lock the files of a set
rows, forms   rows of a file, and documents from rows
documents     one text or conversation
dedupe        drop near duplicates
packing       order documents, hold some out, fill chunks
text          render everything with the model's chat template
held_out      the part that evaluation reads

imatrix            run llama-imatrix, range by range
imatrix_file       the importance matrix as a file; imatrix_dat: the older form
coverage           experts that saw too few tokens
hessians           Hessians for error compensation, by one of two child programs:
                   hessian_collector (llama.cpp) or gradients/ (torch)
hessian_sums       what both programs add up
hessian_file       the Hessians as a file
```

Other packages call ``text.build_calibration_text``, ``imatrix.compute_imatrix``,
``hessians.compute_hessians``, ``held_out.split_by_domain``, and the readers of both files. The
engine imports ``imatrix_file`` and ``hessian_file``, so these two stay light.

The texts themselves are data: ``calibration/sets`` beside the code, described in
``calibration/README.md``. Add a source there, a form of rows in ``forms``, a file type in ``rows``.
What decides bytes stays, because releases are rebuilt from it: the hashes that order and hold out
documents, the packing, the order of additions, and the keys of facts and locks. Change one of them
only with a new version (``HOW``, ``REVISION``, ``FORM``) beside it.
"""
