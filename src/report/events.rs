//! The table of the objects in the `--json` stream. The reference page and the schema are generated from it. Events are
//! built in [`super::Report`]. The fields of results are in `cli/results.rs`.

use crate::error::{Kind, Mistake, mistakes_of};
use serde_json::{Value, json};

/// The version of the stream, which each object contains. It changes if a field is removed or gets another meaning. It
/// does not change if fields or events are added.
pub const FORMAT: u64 = 1;

/// An event of the stream, or the result of a verb (a subcommand such as `bake`).
#[derive(Debug)]
pub struct EventSpec {
    /// The value of the object's field `event`. For a result, this is the name of the verb.
    pub name: &'static str,
    pub doc: &'static str,
    pub fields: &'static [EventField],
}

#[derive(Debug)]
pub struct EventField {
    pub name: &'static str,
    pub value: JsonType,
    /// Whether every object has this field.
    pub always: bool,
    pub doc: &'static str,
}

/// The type of a field's value.
#[derive(Debug)]
pub enum JsonType {
    Text,
    /// One of these texts.
    Words(&'static [&'static str]),
    Integer,
    Boolean,
    List(&'static JsonType),
    /// An object with arbitrary field names. All its values have this type.
    Map(&'static JsonType),
    Object(&'static [EventField]),
    OrNull(&'static JsonType),
    Either(&'static [JsonType]),
    Anything,
}

pub const fn always(name: &'static str, value: JsonType, doc: &'static str) -> EventField {
    EventField { name, value, always: true, doc }
}

pub const fn sometimes(name: &'static str, value: JsonType, doc: &'static str) -> EventField {
    EventField { name, value, always: false, doc }
}

/// The words for kinds of failure.
pub const KINDS: JsonType = JsonType::Words(&[
    Kind::Usage.name(),
    Kind::Definition.name(),
    Kind::NotFound.name(),
    Kind::Step.name(),
    Kind::Cloud.name(),
    Kind::LeftBehind.name(),
    Kind::Machine.name(),
    Kind::Interrupted.name(),
]);
pub const TEXT_OR_NULL: JsonType = JsonType::OrNull(&JsonType::Text);

/// Fields of each event, in addition to `event` and `format`.
pub static COMMON: &[EventField] = &[
    always(
        "at_ms",
        JsonType::Integer,
        "Milliseconds since the start of oven. It is missing from the result of a run that a second signal stopped \
         immediately.",
    ),
    sometimes("image", JsonType::Text, "The name of the definition that the event is about."),
];

const ERROR_KIND: EventField =
    always("kind", KINDS, "The kind of failure, which also decides the exit code.");
const ERROR_MESSAGE: EventField = always("message", JsonType::Text, "What failed, where, and why.");
const ERROR_HINT: EventField = always("hint", TEXT_OR_NULL, "What the user can do about it.");
const ERROR_FILE: EventField = always(
    "file",
    TEXT_OR_NULL,
    "The file with the mistake, such as `web/image.toml`; null if it is not known.",
);
const ERROR_LINE: EventField = always(
    "line",
    JsonType::OrNull(&JsonType::Integer),
    "The line of the mistake, counted from 1; null if it is not known.",
);
const ERROR_KEY: EventField = always(
    "key",
    TEXT_OR_NULL,
    "The key with the mistake, after its table: `disk.iops`, `file.owner`; null if it is not known.",
);

/// The fields of an error in a result.
pub static ERROR: &[EventField] = &[ERROR_KIND, ERROR_MESSAGE, ERROR_HINT, ERROR_FILE, ERROR_LINE, ERROR_KEY];

/// The objects with the fields of [`ERROR`] for all mistakes of an error. There is at least one.
pub fn errors(error: &anyhow::Error) -> Vec<Value> {
    let kind = Kind::of(error).name();
    let object = |mistake: Mistake| {
        let (file, line, key) =
            mistake.place.map_or((None, None, None), |place| (Some(place.file), place.line, place.key));
        json!({
            "kind": kind, "message": mistake.message, "hint": mistake.hint, "file": file, "line": line, "key": key,
        })
    };
    mistakes_of(error).into_iter().map(object).collect()
}

/// All events except the result, which is the last object of the stream.
pub static EVENTS: &[EventSpec] = &[
    EventSpec {
        name: "step",
        doc: "A step begins.",
        fields: &[
            always(
                "phase",
                JsonType::Text,
                "The phase, in one word; `times` adds up the times of each phase.",
            ),
            always("what", JsonType::Text, "What the step does."),
        ],
    },
    EventSpec {
        name: "progress",
        doc: "The progress of the step. There are at most a few such events in a second.",
        fields: &[
            always("phase", JsonType::Text, "The phase of the step."),
            always("bytes", JsonType::Integer, "Bytes that are done; 0 if the step does not count bytes."),
            always("of", JsonType::OrNull(&JsonType::Integer), "Bytes in total; null if this is not known."),
            sometimes("items", JsonType::Integer, "Items that are done, such as packages."),
            sometimes(
                "items_of",
                JsonType::OrNull(&JsonType::Integer),
                "Items in total; null if this is not known.",
            ),
            sometimes(
                "percent",
                JsonType::Integer,
                "The percentage that is done, if the program reports it.",
            ),
            sometimes("name", JsonType::Text, "The name of the item that is in progress."),
        ],
    },
    EventSpec {
        name: "output",
        doc: "A line of the output of a step.",
        fields: &[
            always("phase", JsonType::Text, "The phase of the step."),
            always("line", JsonType::Text, "The line, without control characters and secrets."),
        ],
    },
    EventSpec {
        name: "done",
        doc: "A step is done. A step that failed has no such event.",
        fields: &[
            always("phase", JsonType::Text, "The phase of the step."),
            always("what", JsonType::Text, "What the step did."),
            always("ms", JsonType::Integer, "How many milliseconds it took."),
        ],
    },
    EventSpec {
        name: "note",
        doc: "Something that the user should know. No action is needed.",
        fields: &[always("message", JsonType::Text, "The message.")],
    },
    EventSpec {
        name: "detail",
        doc: "A message that people see only with `--verbose`.",
        fields: &[always("message", JsonType::Text, "The message.")],
    },
    EventSpec {
        name: "warning",
        doc: "A problem that the user should look at. The work continues.",
        fields: &[always("message", JsonType::Text, "The message.")],
    },
    EventSpec {
        name: "error",
        doc: "A mistake or a failure. If a file has several mistakes, each has an event. The result repeats them.",
        fields: &[
            ERROR_KIND,
            ERROR_MESSAGE,
            ERROR_HINT,
            ERROR_FILE,
            ERROR_LINE,
            ERROR_KEY,
            always("log", TEXT_OR_NULL, "The log file of the run."),
        ],
    },
    EventSpec {
        name: "times",
        doc: "How long the phases of a bake took.",
        fields: &[
            always("phases_ms", JsonType::Map(&JsonType::Integer), "Milliseconds of each phase."),
            always("total_ms", JsonType::Integer, "Milliseconds in total."),
        ],
    },
];
