def write_report(out, kind, results):
    return f"{len(results)} results"
