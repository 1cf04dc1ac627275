"""How the report looks: one sheet for light, dark, wide, narrow, and paper."""

from __future__ import annotations

from collections.abc import Mapping

# Text on `page` and `panel` has a contrast of at least 4.5, and so have the colours of runs, `run-0` …, which are those of
# the other pictures (Okabe and Ito's), made darker or lighter until they have it.
LIGHT: Mapping[str, str] = {
    "page": "#fbfaf8",
    "panel": "#ffffff",
    "text": "#1b1f24",
    "soft": "#545c66",
    "rule": "#dcd9d3",
    "accent": "#0b5cad",
    "good": "#0a6b47",
    "bad": "#a8321c",
    "run-0": "#0063a3",
    "run-1": "#b84a00",
    "run-2": "#00704f",
    "run-3": "#9a3b7a",
    "run-4": "#7a5a00",
    "run-5": "#086c80",
    "run-6": "#3c4043",
}
DARK: Mapping[str, str] = {
    "page": "#14171b",
    "panel": "#1c2026",
    "text": "#eceef0",
    "soft": "#a9b2bc",
    "rule": "#363c45",
    "accent": "#7cbcff",
    "good": "#5fd0a0",
    "bad": "#ff9d85",
    "run-0": "#66b7f2",
    "run-1": "#ff9a5c",
    "run-2": "#4fcb9c",
    "run-3": "#e79dcd",
    "run-4": "#e2b84b",
    "run-5": "#5cccdc",
    "run-6": "#dfe2e5",
}
COLOURS_OF_RUNS = 7

_SHEET = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:auto}
body{margin:0;background:var(--page);color:var(--text);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif;overflow-wrap:break-word}
main,header,footer,nav{max-width:1180px;margin:0 auto;padding:0 24px}
header{padding-top:28px}
.eyebrow{margin:0;color:var(--soft);font-size:14px}
h1{font-size:clamp(26px,4.2vw,40px);line-height:1.15;margin:.25em 0 .45em;letter-spacing:-.015em;text-wrap:balance}
h2{font-size:24px;line-height:1.2;margin:0 0 .5em}
h3{font-size:17px;line-height:1.3;margin:1.5em 0 .5em}
section{border-top:1px solid var(--rule);padding:30px 0 26px;margin:0}
p{max-width:75ch;margin:.5em 0}
.question{font-size:18px;color:var(--soft);margin:0 0 .8em}
.answer{font-size:clamp(20px,2.4vw,27px);line-height:1.35;margin:.3em 0 .5em;max-width:46ch}
.answer strong,.also strong{white-space:nowrap}
.also{font-size:18px}
.soft,.note{color:var(--soft)}
.note{font-size:14px}
.fault{border-left:4px solid var(--bad);padding:.2em 0 .2em .8em}
.verdict{display:grid;grid-template-columns:minmax(0,1.5fr) minmax(0,1fr);gap:14px 44px;align-items:start}
.card{background:var(--panel);border:1px solid var(--rule);border-radius:12px;padding:8px 18px 16px}
.card-title{margin:12px 0 4px;font-size:14px;color:var(--soft)}
.card-title b{color:var(--text);margin-right:.5em}
.card-row{display:grid;grid-template-columns:minmax(0,7.5em) minmax(0,1fr) 4.2em;gap:12px;align-items:center;font-size:15px}
.card-row b{text-align:right;font-variant-numeric:tabular-nums}
.card-label{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.interval-mark{fill:none;stroke:var(--text);stroke-width:1.5}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:6px 18px;padding:14px 0 22px;margin:0;font-size:15px}
a{color:var(--accent)}
:focus-visible{outline:3px solid var(--accent);outline-offset:2px;border-radius:3px}
.skip{position:absolute;left:-999px;top:8px;background:var(--panel);padding:8px 12px}
.skip:focus{left:8px}
.panels{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:22px}
figure{margin:0;background:var(--panel);border:1px solid var(--rule);border-radius:10px;padding:14px 16px 8px}
figure h3{margin:0 0 .1em}
figcaption{color:var(--soft);font-size:14px}
svg{display:block;width:100%;height:auto}
svg text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif;fill:var(--soft)}
.grid{stroke:var(--rule);stroke-width:1}
.axis{stroke:var(--soft);stroke-width:1}
.curve{fill:none;stroke-linejoin:round;stroke-linecap:round}
.whisker{stroke-width:1.6}
.reference{stroke:var(--soft);stroke-width:1.4;stroke-dasharray:2 4}
.best{fill:none;stroke:var(--soft);stroke-width:9;opacity:.25;stroke-linejoin:round;stroke-linecap:round}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 22px;padding:0;margin:.2em 0 1em}
.legend li{display:flex;align-items:center;gap:8px;min-width:0}
.legend span{min-width:0;overflow-wrap:anywhere}
.legend svg{width:46px;height:18px;flex:none}
.scroll{overflow-x:auto;max-width:100%;margin:.8em 0;border:1px solid var(--rule);border-radius:8px;background:var(--panel)}
table{border-collapse:collapse;width:100%;font-size:15px;font-variant-numeric:tabular-nums}
caption{text-align:left;overflow-wrap:anywhere;color:var(--soft);padding:10px 12px 6px;font-size:14px}
th,td{padding:7px 12px;text-align:right;vertical-align:top;border-top:1px solid var(--rule)}
.scroll table:not(.cards) tbody th{position:sticky;left:0;background:var(--panel)}
thead th{border-top:0;border-bottom:2px solid var(--rule);color:var(--soft);font-weight:600;vertical-align:bottom}
tbody tr:first-child>*{border-top:0}
th.words,td.words{text-align:left}
tbody th{font-weight:600;min-width:8em}
.scroll table:not(.cards) td:not(.words){white-space:nowrap}
td .interval,th .interval{font-weight:400;display:block;color:var(--soft);font-size:13px;white-space:nowrap}
.score{min-width:118px}
.score svg{margin-top:5px;width:110px;margin-left:auto}
.bar-back{fill:var(--rule)}
details{margin:.8em 0}
figure details{margin:.2em 0}
summary{cursor:pointer;color:var(--accent);padding:3px 0}
pre{overflow-x:auto;background:var(--panel);border:1px solid var(--rule);border-radius:8px;padding:12px 14px;
 margin:.5em 0 1em;font:14px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
code,.quoted{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.92em}
.samples{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:14px;padding:0;margin:.6em 0;list-style:none}
.samples>li{background:var(--panel);border:1px solid var(--rule);border-radius:10px;padding:12px 14px}
.asked{margin:0 0 .2em;font-weight:600}
.expected{margin:0 0 .5em;color:var(--soft);font-size:14px}
.said{list-style:none;padding:0;margin:0;font-size:15px}
.said li{display:grid;grid-template-columns:1.4em minmax(0,9em) minmax(0,1fr);gap:2px 10px;padding:3px 0;
 align-items:baseline}
.said .who{color:var(--soft);font-size:14px;overflow-wrap:anywhere}
.said p{margin:0}
.right{color:var(--good)}
.wrong{color:var(--bad)}
.mark{font-weight:700;text-align:center}
.mark-graded{font-size:13px}
.example{font-size:16px;margin:-.2em 0 .6em}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:4px 18px;margin:.6em 0}
dt{color:var(--soft)}
dd{margin:0}
footer{color:var(--soft);font-size:14px;padding-top:18px;padding-bottom:40px;border-top:1px solid var(--rule)}
@media (max-width:760px){
 main,header,footer,nav{padding-left:16px;padding-right:16px}
 header{padding-top:16px}
 .panels,.samples,.verdict{grid-template-columns:minmax(0,1fr)}
 .question,.also{font-size:16px}
 figure{padding:12px 10px 6px}
 svg text{font-size:16px}
 pre{white-space:pre-wrap;overflow-wrap:anywhere}
 th,td{padding:6px 9px}
 .cards,.cards tbody,.cards tr,.cards th,.cards td,.cards caption{display:block;width:100%}
 .cards thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
 .cards tr{padding:8px 12px;border-top:1px solid var(--rule)}
 .cards th,.cards td{border:0;min-width:0;padding:2px 0;text-align:left}
 .cards td{display:flex;justify-content:space-between;gap:16px;text-align:right;overflow-wrap:anywhere}
 .cards td::before{content:attr(data-label);color:var(--soft);text-align:left;flex:0 0 auto;max-width:55%}
 .said li{grid-template-columns:1.4em minmax(0,1fr)}
 .said p{grid-column:2}
 .card-row{grid-template-columns:minmax(0,7em) minmax(0,1fr) 3.6em}
 dl{grid-template-columns:minmax(0,1fr);gap:0}
 dd{margin:0 0 .5em}
}
@page{margin:14mm}
@media print{
 body{font-size:10.5pt;background:#fff}
 nav,.skip{display:none}
 main,header,footer{max-width:none;padding:0}
 section{padding:14pt 0 10pt}
 h2,h3,caption,summary,.legend,.soft{break-after:avoid}
 svg,tr,.samples>li,pre,.answer{break-inside:avoid}
 thead{display:table-header-group}
 .scroll,pre{overflow:visible}
 .scroll table:not(.cards) td:not(.words){white-space:normal}
 .scroll tbody th{position:static}
 pre{white-space:pre-wrap;font-size:8pt}
 details pre{columns:3;column-gap:10pt;font-size:6.5pt}
 .card-row{grid-template-columns:minmax(0,6em) minmax(0,1fr) 3.6em;gap:8px}
 .answer{font-size:15pt}
 .question,.also{font-size:11pt}
 table{font-size:9pt}
 th,td{padding:3pt 5pt}
 figure table{font-size:7pt}
 figure th,figure td{padding:2pt}
 figure tbody th{min-width:0;overflow-wrap:anywhere}
 .panels,.samples{grid-template-columns:repeat(2,minmax(0,1fr))}
 svg text{font-size:13px}
 details::details-content{display:block;content-visibility:visible;height:auto}
 a{color:inherit;text-decoration:none}
}
"""


def style_sheet() -> str:
    """The CSS of the page: colours as variables, dark ones where the reader prefers them, light ones on paper."""
    runs = "".join(
        f".run-{n}{{color:var(--run-{n})}}.run-{n} .curve,.run-{n}.curve,.run-{n} .whisker{{stroke:var(--run-{n})}}"
        f".run-{n} .dot,.run-{n}.dot{{fill:var(--run-{n});stroke:var(--panel)}}"
        for n in range(COLOURS_OF_RUNS)
    )
    return (
        f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
        f"{_SHEET}{runs}"
    )


def _variables(colours: Mapping[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())
