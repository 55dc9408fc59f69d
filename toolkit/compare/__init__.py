"""`footprint compare`: runs methods side by side, each in its own process, and tests whether they differ by more than noise.

command.py     the subcommand: plan, run, collect, write, show
plan.py        which runs a comparison has, and which flag goes to which method
runner.py      runs the processes, with progress and time left
results.py     turns run folders into one plain object, the content of compare.json
statistics.py  Student's interval over seeds, and significance of differences, over test rows and seeds
tables.py      that object as tables, for terminal, Markdown and CSV
page.py        that object as one HTML page with plots
"""
