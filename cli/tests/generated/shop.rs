// Written by `hopline generate rust` from the schema of `shop.v2`: generate it anew instead of changing it.

#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Kind {
    Book,
    Food,
}

#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Line {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extra: Option<Box<Line>>,
    pub size: (f64, f64),
    pub r#type: Kind,
    #[serde(rename = "unitPrice")]
    pub unit_price: u32,
}

#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Order {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub express: Option<bool>,
    pub labels: std::collections::BTreeMap<String, u8>,
    pub lines: Vec<Line>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum ShopError {
    Closed,
    TooMuch(ShopErrorTooMuch),
    Unknown(String),
}

#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ShopErrorTooMuch {
    pub limit: u32,
}

#[hopline::service(name = "shop", version = 2)]
pub trait Shop {
    async fn add(&self, a: i64, b: i64) -> i64;
    #[rpc(name = "last-order")]
    async fn last_order(&self) -> Option<Order>;
    #[rpc(oneway)]
    async fn note(&self, line: String);
    #[rpc(idempotent, timeout = "2000ms")]
    async fn total(&self, order: Order, discount: Option<u32>) -> Result<u32, ShopError>;
    // `opaque` is left out: its types have no schema.
}
