from .report import KernelRecord


def schedule_generic(mod, spec, refusals):
    from tvm import tirx

    rec = {}
    for gv, f in mod.functions.items():
        if isinstance(f, tirx.PrimFunc) and not (f.attrs and "tirx.is_scheduled" in f.attrs):
            rec[gv.name_hint] = KernelRecord(name=gv.name_hint, kind="fallback", rule="none")
    return mod, rec
