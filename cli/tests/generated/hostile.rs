// Written by `hopline generate rust` from the schema of `Result.v3`: generate it anew instead of changing it.

pub type Empty = serde_json::Value;

#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Error2 {
    #[serde(rename = "Self")]
    Self2,
    #[serde(rename = "self")]
    Self3,
    #[serde(rename = "\"\u{a}")]
    Type,
    None(Box<Error2None>),
}

#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Error2None {
    pub x: Box<Error2>,
}

#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ImportOs {
    #[serde(rename = "\"}\u{a}\u{202e}${x}\\")]
    pub x: String,
    #[serde(rename = "Type", default, skip_serializing_if = "Option::is_none")]
    pub r#type: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inline: Option<ImportOsInline>,
    #[serde(rename = "self")]
    pub self2: String2,
    #[serde(rename = "type")]
    pub type2: Option<i64>,
}

#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ImportOsInline {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deep: Option<(bool,)>,
}

pub type Pair = (String2, ResultClient);

pub type ResultClient = serde_json::Value;

pub type Round = serde_json::Value;

pub type Round2 = Vec<Round>;

#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct String2 {
    pub next: Option<Box<String2>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pair: Option<Box<Pair>>,
}

pub type Tagged = serde_json::Value;

#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Transport2 {
}

#[hopline::service(name = "Result", version = 3)]
pub trait ResultService {
    #[rpc(name = "new")]
    async fn new2(&self, self2: String, t: String2, x_i64_fn_evil: ImportOs, value: serde_json::Value) -> Result<Round, Error2>;
    #[rpc(name = "__init__", oneway)]
    async fn init(&self) -> Result<(), String>;
    async fn constructor(&self, class: bool) -> serde_json::Value;
    #[rpc(name = "a-b")]
    async fn a_b(&self);
    #[rpc(name = "a_b")]
    async fn a_b2(&self);
    async fn r#type(&self) -> Option<String>;
    // `many` is left out: it has more than 16 parameters.
    // `opaque` is left out: its types have no schema.
}
