"""Files, the store, processes, progress, disk and memory: nothing here is about models.

```
files         the one module that gives files their final names: atomic writes, flushes, digests
store         finished work under the digest of its inputs; the only cache of a build
digest_cache  digests of large files, remembered by length, inode and times
process       run another program to its end, with a log that errors quote
child         the one protocol for this project's own child programs
disk, memory  free disk space and free memory, each asked in one place
progress      the fraction done, from the code that works to the code that shows it
toml          strict reading of recipes and calibration sets, every problem reported at once
secrets       tokens and signed URLs kept out of everything that is printed or written
format        JSON with one spelling, digests of text, sizes for people; pure
svg           elements of SVG drawings, with the same bytes on every machine; pure
data          where recipes and calibration sets lie, in a clone and in a wheel
```

Every other package calls this one. Three things must stay, because finished work on users' disks
depends on them: :func:`~quant.core.format.to_canonical_json` (keys of the store and digests in
manifests), the layout of the store (``STAGE/KEY/receipt.json``), and the rename after the flush in
``files`` (a file under its final name is complete, after any crash).

Store, files and digest cache are written by hand. A general cache copies what it keeps, or hashes
it at every start; here one file has hundreds of gigabytes, and a rename puts it into the store.
"""
