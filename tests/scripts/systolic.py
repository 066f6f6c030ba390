#!/usr/bin/env python3
"""Cycles of random products on systolic arrays, as SCALE-Sim counts them (pip install scalesim==3.0.0 'numpy<2').

Rewrites backends/sim/tests/data/systolic.csv. SCALE-Sim's "Total Cycles" is the index of the last cycle, one less than the cycles.
"""

import contextlib
import csv
import io
import pathlib
import random
import tempfile
from importlib.metadata import version

from scalesim.scale_sim import scalesim

OUT = pathlib.Path(__file__).resolve().parents[2] / "backends/sim/tests/data/systolic.csv"
DATAFLOWS = {"os": "output_stationary", "ws": "weight_stationary", "is": "input_stationary"}
PRODUCTS = 25
CONFIG = """[general]
run_name = run
[architecture_presets]
ArrayHeight: {rows}
ArrayWidth: {columns}
IfmapSramSzkB: 4096
FilterSramSzkB: 4096
OfmapSramSzkB: 4096
IfmapOffset: 0
FilterOffset: 10000000
OfmapOffset: 20000000
Bandwidth: 100
Dataflow: {dataflow}
MemoryBanks: 1
ReadRequestBuffer: 32
WriteRequestBuffer: 32
[layout]
IfmapCustomLayout: False
IfmapSRAMBankBandwidth: 10
IfmapSRAMBankNum: 10
IfmapSRAMBankPort: 2
FilterCustomLayout: False
FilterSRAMBankBandwidth: 10
FilterSRAMBankNum: 10
FilterSRAMBankPort: 2
[sparsity]
SparsitySupport: false
SparseRep: ellpack_block
OptimizedMapping: false
BlockSize: 8
RandomNumberGeneratorSeed: 40
[run_presets]
InterfaceBandwidth: CALC
UseRamulatorTrace: False
"""


def report(rows, columns, dataflow, products):
    """SCALE-Sim's total cycles of each product."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "c.cfg").write_text(CONFIG.format(rows=rows, columns=columns, dataflow=dataflow))
        lines = [f"p{i},{m},{n},{k},\n" for i, (m, n, k) in enumerate(products)]
        (folder / "t.csv").write_text("Layer,M,N,K,\n" + "".join(lines))
        layout = [f"p{i}," + "1," * 21 + "\n" for i in range(len(products))]
        (folder / "l.csv").write_text("Layer," + "x," * 21 + "\n" + "".join(layout))
        sim = scalesim(
            save_disk_space=True,
            verbose=False,
            config=str(folder / "c.cfg"),
            topology=str(folder / "t.csv"),
            layout=str(folder / "l.csv"),
            input_type_gemm=True,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            sim.run_scale(top_path=str(folder))
        with open(folder / "run" / "COMPUTE_REPORT.csv") as file:
            read = csv.reader(file)
            column = [name.strip() for name in next(read)].index("Total Cycles")
            return [int(float(row[column])) for row in read]


def main():
    draw = random.Random(1)
    arrays = [(16, 16), (32, 8)] + [(draw.randint(1, 40), draw.randint(1, 40)) for _ in range(6)]
    with open(OUT, "w") as out:
        out.write(f"# Written by tests/scripts/systolic.py with scalesim {version('scalesim')}.\n")
        out.write("dataflow,rows,columns,m,n,k,last_cycle\n")
        for dataflow, name in DATAFLOWS.items():
            for rows, columns in arrays:
                products = [tuple(draw.randint(1, 150) for _ in range(3)) for _ in range(PRODUCTS)]
                cycles = report(rows, columns, dataflow, products)
                assert len(cycles) == len(products)
                for (m, n, k), last in zip(products, cycles):
                    out.write(f"{name},{rows},{columns},{m},{n},{k},{last}\n")


if __name__ == "__main__":
    main()
