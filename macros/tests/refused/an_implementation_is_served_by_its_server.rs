#[hopline::service]
trait Store {
    async fn get(&self, id: u64) -> u64;
}

struct Memory;

impl Store for Memory {
    async fn get(&self, id: u64) -> u64 {
        id
    }
}

async fn serve(server: hopline::Server) {
    server.serve(Memory);
}

fn main() {}
