"""The report's style sheet: light and dark, screen, phone and paper."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf6; --card: #ffffff; --ink: #17211f; --muted: #5a6664; --rule: #e2e0d8;
  --lagoon: #e3f1ef; --federated: #0a6c6c; --local_only: #b4502b; --zero_shot: #77716a;
  --pooled: #3a4658; --training: #7a58a8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0e1515; --card: #141d1d; --ink: #e7eeec; --muted: #9fadaa; --rule: #2b3837;
    --lagoon: #12302f; --federated: #4cc2b8; --local_only: #ee9468; --zero_shot: #a59d94;
    --pooled: #b3c2da; --training: #bb9fe3;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 Inter, -apple-system, BlinkMacSystemFont, "Segoe UI", Roboto, "Liberation Sans",
    Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 32px; }
header {
  display: grid; grid-template-columns: 1fr 188px; gap: 8px 48px; align-items: center; padding-top: 52px;
}
.eyebrow { margin: 0 0 6px; color: var(--federated); font-size: 14px; font-weight: 600; }
h1 { margin: 0; font-size: 44px; line-height: 1.1; letter-spacing: -0.022em; font-weight: 680; }
.lead { margin: 18px 0 0; font-size: 20px; line-height: 1.45; max-width: 36em; text-wrap: pretty; }
.atoll { width: 188px; height: 188px; justify-self: end; }
.atoll .lagoon { fill: var(--lagoon); }
.atoll .island { fill: var(--federated); }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 1px; margin: 40px 0 0;
  background: var(--rule); border: 1px solid var(--rule); border-radius: 10px; overflow: hidden;
}
.tiles div {
  background: var(--card); padding: 16px 20px 14px; display: flex; flex-direction: column-reverse;
  justify-content: flex-end;
}
.tiles dt { color: var(--muted); font-size: 14px; line-height: 1.35; }
.tiles dd { margin: 0; font-size: 25px; font-weight: 640; letter-spacing: -0.015em; line-height: 1.3; }
.tiles .chief dd { color: var(--federated); }
section { margin-top: 60px; }
h2 { margin: 0 0 12px; font-size: 25px; line-height: 1.2; letter-spacing: -0.014em; font-weight: 660; }
h3 { margin: 32px 0 8px; font-size: 17px; font-weight: 640; }
p { margin: 0 0 12px; max-width: 46em; text-wrap: pretty; }
.reading { max-width: 60em; font-size: 18px; line-height: 1.45; margin-bottom: 20px; }
.story { columns: 2; column-gap: 48px; margin-top: 28px; }
.story p { break-inside: avoid; }
.note, caption, figcaption, .none { color: var(--muted); font-size: 14px; }
.none { font-size: inherit; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 10px; background: var(--card); }
.scroll + .note { margin-top: 10px; }
.long { max-height: 520px; overflow-y: auto; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--federated); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; overflow-wrap: normal; }
caption { text-align: left; padding: 12px 20px 4px; }
caption span { display: inline-block; max-width: calc(100vw - 60px); }
th, td { padding: 9px 20px; text-align: right; white-space: nowrap; border-top: 1px solid var(--rule); }
th:first-child, td.text { text-align: left; }
thead th { border-top: 0; color: var(--muted); font-size: 14px; font-weight: 500; }
thead th small { display: block; font-size: 12.5px; font-weight: 400; }
tbody th { font-weight: 450; }
td.text, tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 9em; }
.long thead th { position: sticky; top: 0; background: var(--card); box-shadow: 0 1px 0 var(--rule); }
.chief th, .chief td { font-weight: 660; background: var(--lagoon); }
.gap td { text-align: center; color: var(--muted); background: var(--paper); }
.bar {
  display: block; width: 100%; min-width: 120px; height: 10px; border-radius: 5px; background:
  var(--rule);
}
.bar i {
  display: block; height: 100%; border-radius: 5px; background: var(--zero_shot);
  print-color-adjust: exact;
}
.narrow { max-width: 620px; }
.compare tbody th { white-space: nowrap; }
.compare td:nth-child(2) { width: 40%; padding-right: 28px; }
.compare .chief .bar i { background: var(--federated); }
.compare .local_only .bar i { background: var(--local_only); }
.compare .pooled .bar i { background: var(--pooled); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 16px; }
figure {
  margin: 0; padding: 18px 16px 12px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px;
}
.plot { display: block; width: 100%; max-width: 500px; height: auto; margin: 0 auto; }
.plot text { font-family: inherit; }
.key {
  display: flex; flex-wrap: wrap; gap: 4px 22px; list-style: none; margin: 0 0 14px; padding: 0;
  font-size: 14px;
}
.key svg { width: 30px; height: 10px; margin-right: 8px; vertical-align: 0; }
.facts {
  display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 6px 28px; margin: 0 0 20px;
}
.facts div { display: contents; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; }
.row {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 24px
  48px; align-items: start;
}
code, pre {
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono",
  monospace; font-size: 0.86em;
}
pre {
  margin: 0 0 16px; padding: 14px 20px; overflow-x: auto; background: var(--card); border: 1px solid
  var(--rule); border-radius: 10px; overflow-wrap: normal;
}
summary { cursor: pointer; font-weight: 560; margin-bottom: 12px; }
footer { margin-top: 64px; padding-top: 18px; padding-bottom: 56px; color: var(--muted); font-size: 14px; }
@media (max-width: 720px) {
  header, main, footer { padding-left: 16px; padding-right: 16px; }
  header { grid-template-columns: 1fr; padding-top: 28px; }
  .atoll { display: none; }
  h1 { font-size: 34px; }
  .lead { font-size: 18px; }
  .story { columns: 1; }
  section { margin-top: 44px; }
  th, td { padding: 8px 12px; }
  .tiles { grid-template-columns: 1fr 1fr; margin-top: 28px; }
  .tiles div { padding: 12px 14px; }
  .tiles dd { font-size: 21px; }
  .compare tr > :nth-child(2) { display: none; }
  .compare tbody th { white-space: normal; }
  .tiles div:last-child:nth-child(odd) { grid-column: 1 / -1; }
  .facts { gap: 6px 16px; }
  caption { padding: 10px 12px 2px; }
}
@media print {
  :root {
    color-scheme: light;
    --paper: #ffffff; --card: #ffffff; --ink: #000000; --muted: #444444; --rule: #cccccc;
    --lagoon: #eef5f4; --federated: #0a6c6c; --local_only: #b4502b; --zero_shot: #77716a;
    --pooled: #3a4658; --training: #7a58a8;
  }
  body { font-size: 10.5pt; }
  header, main, footer { padding: 0; max-width: none; }
  section { margin-top: 28pt; }
  .scroll + .note { margin-top: 10px; }
.long { max-height: none; }
  .scroll { overflow: visible; }
  .long thead th { position: static; }
  figure, tr, .tiles, pre { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
