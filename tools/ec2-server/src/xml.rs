//! XML in the form of EC2's responses.

use std::fmt::{Display, Write};

pub const NAMESPACE: &str = "http://ec2.amazonaws.com/doc/2016-11-15/";

/// The content of an element.
#[derive(Default)]
pub struct Xml(String);

impl Xml {
    pub fn text(&mut self, name: &str, value: impl Display) {
        _ = write!(self.0, "<{name}>{}</{name}>", escape(&value.to_string()));
    }

    /// Adds an element if there is a value.
    pub fn some(&mut self, name: &str, value: Option<impl Display>) {
        if let Some(value) = value {
            self.text(name, value);
        }
    }

    pub fn nest(&mut self, name: &str, inside: impl FnOnce(&mut Self)) {
        _ = write!(self.0, "<{name}>");
        inside(self);
        _ = write!(self.0, "</{name}>");
    }

    /// Adds a list, even if it is empty.
    pub fn list<T>(
        &mut self,
        name: &str,
        items: impl IntoIterator<Item = T>,
        mut each: impl FnMut(&mut Self, T),
    ) {
        self.nest(name, |list| {
            for item in items {
                list.nest("item", |inside| each(inside, item));
            }
        });
    }

    /// Returns the text of the first element with this name.
    pub fn first(&self, name: &str) -> Option<&str> {
        let (_, rest) = self.0.split_once(&format!("<{name}>"))?;
        Some(rest.split_once("</")?.0)
    }

    /// Returns a complete response.
    pub fn answer(&self, action: &str, request: &str) -> String {
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<{action}Response xmlns=\"{NAMESPACE}\">\
             <requestId>{request}</requestId>{}</{action}Response>",
            self.0
        )
    }
}

/// Returns an error response.
pub fn error(code: &str, message: &str, request: &str) -> String {
    let (code, message) = (escape(code), escape(message));
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Response><Errors><Error><Code>{code}</Code><Message>{message}\
         </Message></Error></Errors><RequestID>{request}</RequestID></Response>"
    )
}

pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            // A parser would convert this character to a newline.
            '\r' => escaped.push_str("&#13;"),
            // XML does not allow other control characters, even if they are escaped.
            c if c < ' ' && c != '\n' && c != '\t' => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_and_escaped() {
        let mut xml = Xml::default();
        xml.text("name", "a<b>&\u{1}c\r");
        xml.some("none", None::<u8>);
        xml.list("set", [1, 2], |item, n| item.text("n", n));
        assert_eq!((xml.first("n"), xml.first("m")), (Some("1"), None));
        let answer = xml.answer("Do", "r");
        let inside =
            "<name>a&lt;b&gt;&amp;\u{fffd}c&#13;</name><set><item><n>1</n></item><item><n>2</n></item></set>";
        assert!(answer.ends_with(&format!("<requestId>r</requestId>{inside}</DoResponse>")), "{answer}");
        assert!(error("A.B", "x & y", "r").contains("<Code>A.B</Code><Message>x &amp; y</Message>"));
    }
}
