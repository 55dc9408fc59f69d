"""`footprint compare`: methods side by side, each run in a process of its own, and whether they differ by more than noise.

command.py     the subcommand: plan, run, collect, write, show
plan.py        which runs there are, which flag goes to which method, and what makes a folder another comparison
launch.py      the processes, with progress and the time left
results.py     run folders become one plain object: what compare.json holds
statistics.py  Student's interval over seeds, and differences against the noise of test rows and seeds
tables.py      that object as tables, for terminal, Markdown and CSV
page.py        that object as one HTML page with plots
"""
