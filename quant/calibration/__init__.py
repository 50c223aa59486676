"""Calibration: which texts a model reads, and what is learned while it reads them.

From a set to a text: ``sets`` reads a set's TOML, ``datasets`` finds and locks its files, ``rows``
and ``forms`` turn their rows into the ``documents``; ``dedupe`` drops near duplicates, ``packing``
decides order and cuts, and ``text`` renders everything with the model's chat template. ``held_out``
writes the part that evaluation uses.

From a text to importance: ``imatrix`` runs llama-imatrix range by range; ``imatrix_file`` and
``imatrix_dat`` read its files, and ``coverage`` finds the experts that saw too few tokens.
``hessians`` computes the Hessians for error compensation, in one of two child programs
(``hessian_collector``, ``gradients``); ``hessian_sums`` is what both add up, and ``hessian_file``
is the file.

Other packages call ``text.build_calibration_text``, ``imatrix.compute_imatrix``,
``hessians.compute_hessians``, ``held_out.split_by_domain``, and the readers of both files. The
engine imports ``imatrix_file`` and ``hessian_file``, so these two stay light.

The texts themselves are data: ``calibration/sets`` beside the code, described in
``calibration/README.md``. Add a source there, a form of rows in ``forms``, a file type in ``rows``.
What decides bytes stays, because releases are rebuilt from it: the hashes that order and hold out
documents, the packing, the order of additions, and the keys of facts and locks. Change one of them
only with a new version (``HOW``, ``REVISION``, ``FORM``) beside it.
"""
