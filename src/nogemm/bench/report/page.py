"""The page around the report's sections: markup and styles, nothing loaded from elsewhere."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root {
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2430; --soft: #5b6675; --line: #dfe4ea; --grid: #e8ebf0;
  --own: #fff3e6; --c0: #d9480f; --c1: #4c6a92; --c2: #2b8a3e; --c3: #845ef7; --c4: #0b7285; --c5: #a61e4d;
  --c6: #8a6d00; --c7: #868e96;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1a2029; --ink: #e6eaf0; --soft: #9aa7b8; --line: #2c3542; --grid: #262e3a;
    --own: #33261a; --c0: #ff922b; --c1: #82a7db; --c2: #69db7c; --c3: #b197fc; --c4: #66d9e8; --c5: #faa2c1;
    --c6: #ffe066; --c7: #adb5bd;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 18px 60px; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 1.15rem; margin: 0 0 12px; }
.machine, .hint, .note { color: var(--soft); font-size: 0.86rem; margin: 4px 0; }
section, .tiles > div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 18px; margin-top: 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 18px; }
.tiles > div { padding: 14px 16px; }
.tiles b { display: block; font-size: 1.7rem; line-height: 1.2; color: var(--c0); font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: 0.88rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 18px; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: 0.92rem; margin-bottom: 4px; }
svg { display: block; width: 100%; height: auto; max-width: 620px; }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink); }
svg .name { fill: var(--soft); }
svg .label { fill: var(--soft); }
svg .own { font-weight: 700; }
svg .grid { stroke: var(--grid); }
svg .axis { stroke: var(--soft); }
svg .leader { stroke: var(--soft); stroke-width: 0.8; opacity: 0.7; }
svg polyline { fill: none; stroke-width: 1.8; }
svg .strong { stroke-width: 3; }
svg line { stroke-width: 1.4; }
svg .hollow { fill: var(--card); stroke-width: 2; }
.s0 { fill: var(--c0); } .k0 { stroke: var(--c0); }
.s1 { fill: var(--c1); } .k1 { stroke: var(--c1); }
.s2 { fill: var(--c2); } .k2 { stroke: var(--c2); }
.s3 { fill: var(--c3); } .k3 { stroke: var(--c3); }
.s4 { fill: var(--c4); } .k4 { stroke: var(--c4); }
.s5 { fill: var(--c5); } .k5 { stroke: var(--c5); }
.s6 { fill: var(--c6); } .k6 { stroke: var(--c6); }
.s7 { fill: var(--c7); } .k7 { stroke: var(--c7); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 0.86rem; color: var(--soft); margin-top: 6px; }
.legend svg { display: inline-block; width: 22px; height: 12px; margin-right: 6px; vertical-align: middle; }
.legend line { stroke-width: 3; }
.scroll { overflow-x: auto; margin-top: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td small { display: block; color: var(--soft); font-size: 0.78rem; white-space: nowrap; }
td small.why { white-space: normal; min-width: 22ch; max-width: 44ch; }
.hint ul { margin: 2px 0 6px; padding-left: 18px; }
.hint li { overflow-wrap: anywhere; }
tr.own td { background: var(--own); }
tr.own td:first-child { box-shadow: inset 3px 0 var(--c0); padding-left: 10px; font-weight: 600; }
.tag { font: 0.74rem system-ui, sans-serif; border: 1px solid var(--line); border-radius: 8px; padding: 0 7px; }
.tag { color: var(--soft); }
code { font-size: 0.86em; overflow-wrap: anywhere; }
p { margin: 6px 0; }
@media (max-width: 700px) {
  table { min-width: 620px; }
  main { padding: 18px 12px 40px; }
  section { padding: 14px; }
}
details { margin-top: 14px; }
summary { cursor: pointer; color: var(--soft); font-size: 0.9rem; }
@media print { section { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<h1>$title</h1>
$machine
$body
</main>
</body>
</html>
"""
