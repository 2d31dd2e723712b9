#[hopline::service]
trait Demo {
    #[rpc(name = "a.b")]
    async fn put(&self);
    #[rpc(name = "a b")]
    async fn set(&self);
    #[rpc(name = "")]
    async fn get(&self);
}

fn main() {}
