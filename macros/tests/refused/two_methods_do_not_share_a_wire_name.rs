#[hopline::service]
trait Demo {
    async fn put(&self);
    #[rpc(name = "put")]
    async fn set(&self);
    #[cfg(unix)]
    #[rpc(name = "put")]
    async fn get(&self);
}

fn main() {}
