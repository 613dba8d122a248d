//! Text in and out: tokenizer, chat template, and a detokeniser that streams whole characters.
//!
//! A token is a piece of bytes, not of text: a character may span tokens, and what a token decodes to may depend on
//! the one before it. [`TextDecoder`] therefore decodes a short window again with every token and releases only what
//! can no longer change.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use minijinja::{Environment, ErrorKind, Value, context};
use serde::Serialize;
use serde_json::Value as Json;

use super::TextStream;
use crate::error::{Error, Result};

/// What an incomplete character decodes to.
const REPLACEMENT: char = '\u{fffd}';

/// One turn of a conversation, as chat templates see it.
#[derive(Clone, Debug, Serialize)]
pub struct Message {
    /// "system", "user" or "assistant".
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A user turn.
    pub fn user(content: impl Into<String>) -> Self {
        Self {
            role: "user".into(),
            content: content.into(),
        }
    }
}

/// The tokenizer of a checkpoint directory, with its chat template if it has one.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    template: Option<ChatTemplate>,
}

#[derive(Clone)]
struct ChatTemplate {
    file: PathBuf,
    source: String,
    bos_token: String,
    eos_token: String,
}

impl Tokenizer {
    /// Whether `dir` has a tokenizer at all; generation from token ids works without one.
    pub fn exists(dir: &Path) -> bool {
        dir.join("tokenizer.json").exists()
    }

    /// Loads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` (where present) from `dir`.
    pub fn load(dir: &Path) -> Result<Self> {
        let file = dir.join("tokenizer.json");
        let bytes = std::fs::read(&file).map_err(|source| Error::io(&file, source))?;
        let inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| {
            Error::checkpoint(
                &file,
                "tokenizer",
                "a Hugging Face tokenizer",
                one_line(&e.to_string()),
            )
        })?;
        Ok(Self {
            inner: Arc::new(inner),
            template: ChatTemplate::load(dir)?,
        })
    }

    /// Whether the checkpoint brings a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Token ids of `text`. Special tokens written out in the text are recognised; the tokenizer's own
    /// post-processor (a leading BOS, say) is applied when `add_special` is set.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode(text, add_special).map_err(|e| {
            Error::argument(
                "prompt",
                "text the tokenizer can encode",
                one_line(&e.to_string()),
            )
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|e| {
            Error::argument(
                "token ids",
                "ids the tokenizer knows",
                one_line(&e.to_string()),
            )
        })
    }

    /// The prompt of a conversation: the chat template with the assistant's turn opened.
    ///
    /// # Errors
    /// The checkpoint has no chat template, or the template refuses the messages.
    pub fn render_chat(&self, messages: &[Message]) -> Result<String> {
        let template = self.template.as_ref().ok_or_else(|| {
            Error::argument(
                "chat template",
                "one in the target's directory",
                "none (use --raw)",
            )
        })?;
        template.render(messages)
    }

    /// Token ids of one user turn: through the chat template where there is one, as plain text otherwise or if `raw`.
    pub fn encode_prompt(&self, text: &str, raw: bool) -> Result<Vec<u32>> {
        if raw || !self.has_chat_template() {
            self.encode(text, true)
        } else {
            self.encode(&self.render_chat(&[Message::user(text)])?, false)
        }
    }

    /// A streaming decoder for one request.
    pub fn stream(&self) -> TextDecoder {
        TextDecoder {
            tokenizer: self.clone(),
            ids: Vec::new(),
            context_start: 0,
            released: 0,
        }
    }
}

impl ChatTemplate {
    fn load(dir: &Path) -> Result<Option<Self>> {
        let config_file = dir.join("tokenizer_config.json");
        let config = match std::fs::read(&config_file) {
            Ok(bytes) => serde_json::from_slice::<Json>(&bytes).map_err(|e| {
                Error::checkpoint(
                    &config_file,
                    "tokenizer_config.json",
                    "JSON",
                    one_line(&e.to_string()),
                )
            })?,
            Err(_) => Json::Null,
        };
        let jinja_file = dir.join("chat_template.jinja");
        let (file, source) = if let Ok(source) = std::fs::read_to_string(&jinja_file) {
            (jinja_file, source)
        } else if let Some(source) = default_template(&config["chat_template"]) {
            (config_file, source)
        } else {
            return Ok(None);
        };
        let token = |name: &str| special_token(&config[name]);
        Ok(Some(Self {
            file,
            source,
            bos_token: token("bos_token"),
            eos_token: token("eos_token"),
        }))
    }

    fn render(&self, messages: &[Message]) -> Result<String> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |reason: String| -> std::result::Result<Value, _> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, reason))
            },
        );
        let fail = |e: minijinja::Error| {
            Error::checkpoint(
                &self.file,
                "chat_template",
                "a template that renders",
                one_line(&format!("{e:#}")),
            )
        };
        environment
            .add_template("chat", &self.source)
            .map_err(fail)?;
        environment
            .get_template("chat")
            .and_then(|template| {
                template.render(context! {
                    messages,
                    add_generation_prompt => true,
                    bos_token => self.bos_token,
                    eos_token => self.eos_token,
                })
            })
            .map_err(fail)
    }
}

/// `chat_template` is a string, or a list of named ones of which "default" counts.
fn default_template(value: &Json) -> Option<String> {
    match value {
        Json::String(source) => Some(source.clone()),
        Json::Array(named) => named
            .iter()
            .find(|entry| entry["name"] == "default")
            .or(named.first())
            .and_then(|entry| entry["template"].as_str())
            .map(str::to_owned),
        _ => None,
    }
}

/// A special token is a string or an object with its `content`.
fn special_token(value: &Json) -> String {
    value
        .as_str()
        .or_else(|| value["content"].as_str())
        .unwrap_or_default()
        .to_owned()
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Turns one request's tokens into text, never splitting a character.
pub struct TextDecoder {
    tokenizer: Tokenizer,
    ids: Vec<u32>,
    /// First id of the window that is decoded again with every token.
    context_start: usize,
    /// Ids before this have had their text released.
    released: usize,
}

impl TextStream for TextDecoder {
    fn push(&mut self, token: u32) -> String {
        self.ids.push(token);
        self.release(false)
    }

    /// An unfinished character comes as U+FFFD.
    fn finish(&mut self) -> String {
        self.release(true)
    }
}

impl TextDecoder {
    fn release(&mut self, all: bool) -> String {
        let before = self.decode(self.context_start..self.released);
        let now = self.decode(self.context_start..self.ids.len());
        let complete = all || !now.ends_with(REPLACEMENT);
        match now.strip_prefix(before.as_str()) {
            Some(new) if complete && !new.is_empty() => {
                self.context_start = self.released;
                self.released = self.ids.len();
                new.to_owned()
            }
            _ => String::new(),
        }
    }

    fn decode(&self, range: std::ops::Range<usize>) -> String {
        self.tokenizer.decode(&self.ids[range]).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A byte-level tokenizer whose tokens are single bytes, so that characters span tokens.
    fn byte_tokenizer() -> Tokenizer {
        // GPT-2's byte-to-character table.
        let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
        let mut extra = 256;
        let mut vocab = serde_json::Map::new();
        for byte in 0..256u32 {
            let code = if printable(byte) {
                byte
            } else {
                extra += 1;
                extra - 1
            };
            vocab.insert(char::from_u32(code).unwrap().to_string(), byte.into());
        }
        let json = serde_json::json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "truncation": null, "padding": null,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        Tokenizer::load(dir.path()).unwrap()
    }

    #[test]
    fn streaming_never_splits_a_character_and_loses_nothing() {
        let tokenizer = byte_tokenizer();
        let text = "a é 漢字 👩‍🚀 end\n\t ok";
        let mut stream = tokenizer.stream();
        let mut pieces = Vec::new();
        for byte in text.bytes() {
            pieces.push(stream.push(u32::from(byte)));
        }
        pieces.push(stream.finish());
        assert!(
            pieces.iter().all(|piece| !piece.contains(REPLACEMENT)),
            "{pieces:?}"
        );
        assert_eq!(pieces.concat(), text);
    }

    #[test]
    fn an_unfinished_character_comes_out_at_the_end_only() {
        let mut stream = byte_tokenizer().stream();
        assert_eq!(stream.push(u32::from(b'x')), "x");
        assert_eq!(stream.push(0xe6), "");
        assert_eq!(stream.finish(), "\u{fffd}");
    }

    #[test]
    fn templates_render_as_in_python() {
        let template = |source: &str| ChatTemplate {
            file: "t".into(),
            source: source.into(),
            bos_token: "<s>".into(),
            eos_token: "</s>".into(),
        };
        let source = "{% for m in messages[::-1] %}\n    {%- if m.role.startswith('us') %}\n{{ bos_token + m.content.strip() }}\
                      {% endif %}{% endfor %}{% if add_generation_prompt %}{{ '!' }}{% endif %}";
        assert_eq!(
            template(source).render(&[Message::user("  hi ")]).unwrap(),
            "<s>hi!"
        );
        let refused = template("{{ raise_exception('no\nway') }}")
            .render(&[])
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("no way") && !refused.contains('\n'),
            "{refused}"
        );
    }

    #[test]
    fn a_broken_tokenizer_names_its_file() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
        let error = Tokenizer::load(dir.path()).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
}
