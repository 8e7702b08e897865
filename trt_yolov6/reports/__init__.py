"""The report of a comparison: one HTML page that needs nothing else, and Markdown and CSV.

    results.json, sensitivity.json ──▶ material ──▶ tables, figures, sections ──▶ page

`material` reads and checks the files, `tables` makes rows that all three forms share, `figures`
draws SVG, `sections` gathers what each section shows, and `write` renders `page.html.jinja`, which
escapes whatever it shows, with its style and script.
"""
