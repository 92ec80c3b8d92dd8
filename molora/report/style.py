"""How the HTML report looks: light and dark, on a narrow screen and on paper, without a script."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --paper: #ffffff; --card: #f6f8fa;
  --hue: 37 99 168; --most: 1; --pale: #000; --deep: #fff; --bar: #2563a8; --warn: #9a3412; --warn-paper: #fff4ed }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9ba6b1; --line: #3a424c; --paper: #0d1117; --card: #161b22; --hue: 88 166 255;
    --most: .8; --pale: #fff; --deep: #000; --bar: #58a6ff; --warn: #ffb38a; --warn-paper: #2b1a10 }
}
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem;
  color: var(--ink); background: var(--paper) }
h1, h2, h3 { line-height: 1.25 }
h1 { margin: .2rem 0 }
h2 { margin: 2.4rem 0 .6rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
.lead { font-size: 1.15rem; margin: .3rem 0 1rem }
.warn { border-left: 4px solid var(--warn); background: var(--warn-paper); color: var(--warn); margin: .5rem 0;
  padding: .5rem .8rem }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; list-style: none; margin: 0 }
a { color: var(--bar) }
:focus-visible { outline: 3px solid var(--bar); outline-offset: 2px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; margin: .3rem 0 }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: baseline }
th { text-align: left; font-weight: 600 }
tbody th { font-weight: 400 }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
small { color: var(--soft) }
.heat td, .heat thead th { text-align: center; padding: .3rem .5rem; font-variant-numeric: tabular-nums }
.heat thead th:first-child { text-align: left }
.heat td { background: rgb(var(--hue) / calc(var(--w) * var(--most))); color: var(--pale); border: 1px solid var(--paper);
  min-width: 3.4rem }
.heat .top { font-weight: 700 }
.heat .deep { color: var(--deep) }
.heat .none { background: none }
.choice { border: 1px solid var(--line); border-radius: 4px; display: flex; flex-wrap: wrap; gap: .2rem 1rem;
  padding: .4rem .8rem; margin: 0 }
.choice legend { color: var(--soft) }
.choice label { order: 1; cursor: pointer }
.choice::after { order: 2; flex-basis: 100%; content: "" }
.panel { order: 3; overflow-x: auto; max-width: 100% }
.choice:not(.some) .panel { flex-basis: 100% }
.panel .heat { font-size: .8rem }
.panel .heat td { min-width: 2.4rem; padding: .1rem .3rem }
@supports selector(:has(a)) {
  .panel { display: none }
  label:has(:checked) + .panel, .some:has(.every :checked) .panel { display: block }
}
svg, img { max-width: 100%; height: auto }
img { background: #fff; border-radius: 4px }
pre { background: var(--card); padding: 1rem; overflow-x: auto }
summary { cursor: pointer; font-weight: 600; margin: 1rem 0 .3rem }
@media print {
  body { max-width: none; padding: 0 }
  nav { display: none }
  h2 { break-after: avoid }
  table, svg, img { break-inside: avoid }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
"""
