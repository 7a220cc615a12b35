//! Formats the running steps as lines of a terminal, and as lines of a log without a terminal.

use super::progress::{Amount, Meter, bytes_text, rate_text, time_text};
use std::time::{Duration, Instant};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// A step that ends within this time is not shown as running.
const SHORT: Duration = Duration::from_millis(300);
/// The begin of each line of a running step.
const MARK: &str = "  … ";
/// The begin of a line that has no room for the number of bytes. Each progress of the step turns it.
const TURNING_MARKS: [&str; 4] = ["  | ", "  / ", "  - ", "  \\ "];
/// The text between two parts of a line.
const GAP: &str = "  ";
/// A title that has to be cut has at least this many columns, in addition to the image's name. Otherwise other parts of
/// the line are left out.
const MIN_TITLE: usize = 14;
/// The last line of a step's output is shown if there is room for this many columns.
const MIN_OUTPUT: usize = 8;
/// The maximal number of characters of a step's output in a line without a terminal.
const OUTPUT_MAX: usize = 100;

/// A running step.
#[derive(Debug)]
pub struct RunningStep {
    pub id: u64,
    /// `NAME: ` if several images are baked.
    pub prefix: String,
    /// One word.
    pub phase: String,
    pub what: String,
    /// The last line of the step's output.
    pub output: String,
    pub meter: Meter,
    pub started: Instant,
    /// How many reminders were printed.
    pub reminders: u32,
}

/// The parts of a line after the title.
#[derive(Debug, Clone, Default)]
struct Parts {
    items: String,
    percent: String,
    bytes: String,
    rate: String,
    time: String,
    name: String,
}

/// How much of a line is left out, from nothing to everything but the name.
const LEVELS: usize = 6;
/// The level from which on the number of bytes is left out.
const WITHOUT_BYTES: usize = 3;

impl Parts {
    fn of(step: &RunningStep, now: Instant) -> Self {
        let (meter, progress) = (&step.meter, &step.meter.progress);
        let items = progress.items.map(items_text).unwrap_or_default();
        let remaining = meter.remaining(now).map(|time| format!("~{}", time_text(time)));
        Self {
            items: if items.is_empty() {
                items
            } else {
                format!("{items} {}", progress.unit).trim_end().to_owned()
            },
            percent: progress.percent.map(|percent| format!("{percent} %")).unwrap_or_default(),
            bytes: progress.bytes.map(bytes_text).unwrap_or_default(),
            rate: meter.bytes_per_second(now).map(rate_text).unwrap_or_default(),
            time: remaining.unwrap_or_else(|| time_text(now.duration_since(step.started))),
            name: progress.name.clone(),
        }
    }

    /// Returns the parts that are shown at a level.
    fn at(&self, level: usize) -> Vec<&str> {
        let Self { items, percent, bytes, rate, time, name } = self;
        let number = items.split(' ').next().unwrap_or_default();
        let shown = |until: usize, part| if level < until { part } else { "" };
        let items = if level < 1 { items } else { shown(5, number) };
        let parts =
            [items, shown(5, percent), shown(WITHOUT_BYTES, bytes), shown(2, rate), shown(4, time), name];
        parts.into_iter().filter(|part| !part.is_empty()).collect()
    }
}

fn items_text(Amount { done, of }: Amount) -> String {
    of.map_or(done.to_string(), |of| format!("{}/{of}", done.min(of)))
}

/// Returns the lines for a terminal of `width` columns and `height` rows. There are fewer lines than rows. If there are
/// more steps, the last line has their number.
pub fn terminal_lines(
    steps: &[RunningStep],
    now: Instant,
    (width, height): (usize, usize),
    dim: &dyn Fn(&str) -> String,
) -> Vec<String> {
    let long = steps.iter().filter(|step| now.duration_since(step.started) >= SHORT);
    let mut lines: Vec<_> = long.map(|step| terminal_line(step, now, width, dim)).collect();
    let max = height.saturating_sub(1).max(1);
    if lines.len() > max {
        let more = lines.len() + 1 - max;
        lines.truncate(max - 1);
        lines.push(cut(&format!("{MARK}and {more} more"), width));
    }
    lines
}

/// Returns the line of a step. If the line is too narrow for everything, the title is cut and numbers are left out, so
/// that the name of the current item is complete. A name that is wider than the line is left out.
fn terminal_line(step: &RunningStep, now: Instant, width: usize, dim: &dyn Fn(&str) -> String) -> String {
    let mut parts = Parts::of(step, now);
    if MARK.width() + parts.name.width() > width {
        parts.name.clear();
    }
    let RunningStep { prefix, phase, what, output, .. } = step;
    let title = format!("{prefix}{what}");
    let short_title =
        if prefix.is_empty() { phase.as_str() } else { prefix.trim_end().trim_end_matches(':') };
    let line_at = |title: &str, min: usize, level: usize| {
        fit(title, min, &parts.at(level), width).map(|line| (line, level))
    };
    let line = (0..LEVELS).find_map(|level| {
        let line = line_at(&title, prefix.width() + MIN_TITLE, level);
        let short = || line_at(short_title, short_title.width(), level);
        line.or_else(|| if level == 0 { None } else { short() })
    });
    let line = line.or_else(|| (1..LEVELS).find_map(|level| line_at("", 0, level)));
    let (mut line, level) = line.unwrap_or_else(|| (cut(&format!("{MARK}{title}"), width), LEVELS));
    if level >= WITHOUT_BYTES
        && let (Some(turns), Some(rest)) = (step.meter.turns(), line.strip_prefix(MARK))
    {
        line = format!("{}{rest}", TURNING_MARKS[turns % TURNING_MARKS.len()]);
    }
    let room = width.saturating_sub(line.width() + GAP.width());
    if parts.name.is_empty() && !output.is_empty() && room >= MIN_OUTPUT {
        return format!("{line}{GAP}{}", dim(&cut(output, room)));
    }
    line
}

/// Returns the line with this title and these parts. If the title is too wide, it is cut to at least `min` columns.
/// Returns `None` if this is not possible.
fn fit(title: &str, min: usize, parts: &[&str], width: usize) -> Option<String> {
    let parts = parts.join(GAP);
    let gap = if title.is_empty() || parts.is_empty() { "" } else { GAP };
    let room = width.checked_sub(MARK.width() + gap.width() + parts.width())?;
    if title.width() > room && room < min.max(1) {
        return None;
    }
    Some(format!("{MARK}{}{gap}{parts}", cut(title, room)))
}

/// Cuts a text to a number of columns. A text that was cut ends with `…`.
fn cut(text: &str, columns: usize) -> String {
    if text.width() <= columns {
        return text.to_owned();
    }
    let mut rest = columns.saturating_sub(1);
    let fits = |c: &char| {
        let width = c.width().unwrap_or_default();
        let fits = width <= rest;
        rest = if fits { rest - width } else { 0 };
        fits
    };
    let begin: String = text.chars().take_while(fits).collect();
    if columns == 0 { begin } else { format!("{}…", begin.trim_end()) }
}

/// Returns the line that is printed from time to time if there is no terminal, without the image's name.
pub fn reminder(step: &RunningStep, now: Instant) -> String {
    let mut parts = Parts::of(step, now);
    let elapsed = time_text(now.duration_since(step.started));
    if parts.time == elapsed {
        parts.time.clear();
    }
    let mut parts: Vec<_> = parts.at(0).into_iter().map(str::to_owned).collect();
    if step.meter.progress.name.is_empty() && !step.output.is_empty() {
        parts.push(cut(&step.output, OUTPUT_MAX));
    }
    let begin = format!("  {}still {} ({elapsed})", step.prefix, step.what);
    if parts.is_empty() { begin } else { format!("{begin}: {}", parts.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::progress::Progress;
    use std::sync::LazyLock;

    /// The time of all tests. They do not depend on the clock.
    static NOW: LazyLock<Instant> = LazyLock::new(|| Instant::now() + Duration::from_secs(1000));

    fn step(what: &str, output: &str, seconds: u64) -> RunningStep {
        let started = *NOW - Duration::from_secs(seconds);
        let (prefix, phase, meter) = (String::new(), "fetch".to_owned(), Meter::default());
        RunningStep {
            id: 0,
            prefix,
            phase,
            what: what.into(),
            output: output.into(),
            meter,
            started,
            reminders: 0,
        }
    }

    /// A download of 143 MB at 1.4 MB/s, of which 38 seconds remain.
    fn download(prefix: &str, name: &str) -> RunningStep {
        let mut step = step("downloading 12 packages and dependencies", "", 9);
        step.prefix = prefix.into();
        let progress = |bytes: u64| Progress {
            bytes: Some(Amount { done: bytes, of: Some(143_000_000) }),
            name: name.into(),
            ..Progress::of_items(41, 64, "packages")
        };
        step.meter.set(progress(80_000_000), step.started);
        step.meter.set(progress(89_800_000), step.started + Duration::from_secs(7));
        step.started += Duration::from_secs(2);
        step
    }

    fn shown(steps: &[RunningStep], width: usize) -> Vec<String> {
        terminal_lines(steps, *NOW, (width, 24), &|text| format!("<{text}>"))
    }

    #[test]
    fn running_steps_have_a_line_each() {
        assert!(shown(&[], 80).is_empty());
        assert!(shown(&[step("testing", "", 0)], 80).is_empty(), "too short to be shown");
        assert_eq!(shown(&[step("testing", "", 3)], 80), ["  … testing  3 s"]);
        assert_eq!(shown(&[step("testing", "a line", 3)], 80), ["  … testing  3 s  <a line>"]);
        assert_eq!(shown(&[step("testing", "a long line", 3)], 27), ["  … testing  3 s  <a long l…>"]);
        assert_eq!(shown(&[step("testing", "a long line", 3)], 9), ["  … fetch"]);
        let two = [step("testing", "ok", 3), step("installing", "", 75)];
        assert_eq!(shown(&two, 80), ["  … testing  3 s  <ok>", "  … installing  75 s"]);
        assert_eq!(shown(&two, 24), ["  … testing  3 s", "  … installing  75 s"], "no room for the output");
    }

    #[test]
    fn a_download_shows_its_numbers_and_never_cuts_the_name() {
        let line = |width| shown(&[download("", "libgcc-s1")], width).concat();
        let numbers = "  41/64 packages  90/143 MB  1.1 MB/s  ~48 s  libgcc-s1";
        assert_eq!(line(200), format!("  … downloading 12 packages and dependencies{numbers}"));
        assert_eq!(line(80), format!("  … downloading 12 packa…{numbers}"));
        assert!(line(40).ends_with(" fetch  41/64  ~48 s  libgcc-s1"), "{}", line(40));
        for name in
            ["a", "libgcc-s1", "linux-image-6.1.0-28-cloud-amd64", "libgoogle-api-services-storage-java-doc"]
        {
            for prefix in ["", "web: ", "a-very-long-name-of-an-image: "] {
                for width in 1..=200 {
                    let line = shown(&[download(prefix, name)], width).concat();
                    assert!(line.width() <= width, "{width}: {line:?}");
                    assert!(width < name.len() + 4 || line.ends_with(name), "{width}: {line:?}");
                    assert!(
                        name.len() < 4 || !line.contains(&name[..name.len() - 1]) || line.contains(name),
                        "{width}: {line:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_line_without_numbers_turns_with_each_progress() {
        let name = "a-package-whose-name-fills-the-line1";
        let mut step = download("", name);
        let mut marks: Vec<_> = (0..4)
            .map(|more| {
                let bytes = Some(Amount { done: 90_000_000 + more, of: Some(143_000_000) });
                let progress = Progress { bytes, name: name.into(), ..Progress::default() };
                step.meter.set(progress.clone(), *NOW);
                step.meter.set(progress, *NOW); // the same again
                let line = shown(std::slice::from_ref(&step), 40).concat();
                assert!(line.ends_with(name) && line.width() == 40, "{line:?}");
                assert!(shown(std::slice::from_ref(&step), 80).concat().starts_with(MARK));
                line
            })
            .collect();
        marks.sort();
        marks.dedup();
        assert_eq!(marks.len(), 4, "{marks:?}");
        assert!(shown(&[self::step("testing", "", 3)], 9).concat().starts_with(MARK), "no progress");
    }

    #[test]
    fn wide_characters_need_two_columns() {
        assert_eq!(cut("日本語", 6), "日本語");
        assert_eq!(cut("日本語", 5), "日本…");
        assert_eq!(cut("日本語", 4), "日…");
        assert_eq!(cut("abc", 0), "");
        let step = RunningStep {
            prefix: "日: ".into(), ..step("日本語のパッケージ", "出力の行です", 3)
        };
        for width in 1..60 {
            let steps = std::slice::from_ref(&step);
            let line = terminal_lines(steps, *NOW, (width, 24), &|text| text.to_owned()).concat();
            assert!(line.width() <= width, "{width}: {line:?}");
        }
    }

    #[test]
    fn steps_for_which_there_is_no_row_are_counted() {
        let steps: Vec<_> = (0..20).map(|n| step(&format!("step {n}"), "", 3)).collect();
        let lines = |height| terminal_lines(&steps, *NOW, (40, height), &|text| text.to_owned());
        assert_eq!(lines(12).len(), 11);
        assert_eq!(lines(12).last().unwrap(), "  … and 10 more");
        assert_eq!(lines(21).len(), 20);
        assert_eq!(lines(2), ["  … and 20 more"]);
        assert_eq!(lines(0), ["  … and 20 more"]);
    }

    #[test]
    fn without_a_terminal_a_line_says_how_far_a_step_is() {
        let step_line = |step: &RunningStep| reminder(step, step.started + Duration::from_secs(60));
        let line = step_line(&download("web: ", "libgcc-s1"));
        assert!(line.starts_with(
            "  web: still downloading 12 packages and dependencies (60 s): 41/64 packages, 90/143 MB"
        ));
        assert!(line.ends_with(", libgcc-s1"), "{line}");
        assert_eq!(step_line(&step("testing", "", 0)), "  still testing (60 s)");
        assert_eq!(step_line(&step("testing", "ok 12", 0)), "  still testing (60 s): ok 12");
    }
}
