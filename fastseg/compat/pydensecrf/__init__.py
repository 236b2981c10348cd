"""pydensecrf's modules over fastseg's dense CRF: the same names, arguments, results and errors.

Replace ``import pydensecrf.densecrf as dcrf`` by
``import fastseg.compat.pydensecrf.densecrf as dcrf``. Inference uses all of torch's threads and
releases the GIL.
"""
