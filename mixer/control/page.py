"""The frame of the report's page: words and looks; `mixer.control.report` fills in the @places@.

Nothing in it is loaded from anywhere, and there is no script. Colours are named once for light and once for dark.
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>@title@ - run report</title>
<style>
:root { --ink: #1c2127; --soft: #5d6671; --grid: #dfe3e8; --ground: #fefefe; --page: #f3f4f6; --good: #00734f;
  --bad: #b44700; --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a3abb5; --grid: #343a42; --ground: #1b1f24; --page: #121519; --good: #3ecf9d;
    --bad: #ff9a57; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 var(--sans); }
main { max-width: 1240px; margin: 0 auto; padding: 20px 14px 60px; }
h1 { margin: 0; font-size: 26px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 34px 0 10px; font-size: 18px; }
.status { display: inline-block; margin-left: 8px; padding: 1px 10px; border: 1px solid currentColor; font-size: 14px;
  border-radius: 99px; font-weight: 600; vertical-align: middle; color: var(--soft); }
.finished, .running { color: var(--good); }
.stopped, .not-finished { color: var(--bad); }
.lead, .none, figcaption, footer { color: var(--soft); }
.lead { margin: 6px 0 16px; }
.tiles { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); }
.tile, figure, .wide, details { background: var(--ground); border: 1px solid var(--grid); border-radius: 8px; }
.tile { padding: 9px 12px; }
.tile b { display: block; font-size: 19px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.pictures { display: grid; gap: 12px; margin-top: 12px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); }
figure { margin: 0; padding: 8px 10px 10px; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { font-size: 13px; padding: 4px 4px 0; }
.wide { overflow: auto; max-height: 70vh; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: var(--ground); color: var(--soft); font-weight: 600; text-align: left; }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--grid); white-space: nowrap; }
td:nth-child(4):not(.n) { white-space: normal; min-width: 240px; }
tr:last-child td { border-bottom: 0; }
.n { text-align: right; }
details { margin-top: 12px; padding: 8px 12px; }
summary { cursor: pointer; }
pre { overflow: auto; font-size: 12.5px; }
footer { margin-top: 36px; font-size: 13px; }
@media print { body { background: #fff; } .wide { max-height: none; } figure { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<header>
<h1>@title@<span class="status @state@">@status@</span></h1>
<p class="lead">@lead@</p>
<div class="tiles">@tiles@</div>
</header>
<div class="pictures" style="margin-top: 20px">
@pictures@</div>
<h2>Domains</h2>
@domains@
<h2>Evaluation</h2>
@sets@
<h2>What happened</h2>
@events@
<h2>How it was set</h2>
@config@
<footer>@note@Weights count rows; all rows have one length, so they count tokens too. The page's numbers lie in it as
JSON, under the id <code>run-data</code>.</footer>
</main>
<script type="application/json" id="run-data">@data@</script>
</body>
</html>
"""
