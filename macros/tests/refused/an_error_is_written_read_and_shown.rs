#[derive(serde::Serialize, serde::Deserialize)]
pub enum NotShown {}

#[derive(Debug, serde::Serialize)]
pub enum NotRead {}

#[derive(Debug, serde::Deserialize)]
pub enum NotWritten {}

#[hopline::service]
trait Store {
    async fn put(&self) -> Result<(), NotShown>;
    async fn set(&self) -> Result<(), NotRead>;
    async fn get(&self) -> Result<(), NotWritten>;
    #[rpc(oneway)]
    async fn forget(&self) -> Result<(), NotWritten>;
}

fn main() {}
