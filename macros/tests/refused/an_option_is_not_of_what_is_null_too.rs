#[hopline::service]
trait Store {
    async fn put(&self, done: Option<()>);
    async fn set(&self, values: std::collections::HashMap<String, Vec<Option<Option<u8>>>>);
    async fn get(&self) -> Result<Option<Box<std::option::Option<u8>>>, String>;
    async fn all(&self) -> (u8, [Option<()>; 2]);
}

fn main() {}
